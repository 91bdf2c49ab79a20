"""Options of `grinmoe push` and `grinmoe pull`."""

import os
import re
from dataclasses import dataclass, field
from typing import Annotated

from ..files import NewFolder

# Letters of a git reference, without what git refuses: "..", a part that begins with "." or ends with ".lock".
_REFERENCE = re.compile(r"(?!.*\.\.)(?!.*\.lock(/|$))[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*(?<!\.)", re.ASCII)


@dataclass(frozen=True)
class CardOverrides:
    """What a user says about a card when publishing it; None: not said. Fields without a flag: as in `CardFacts`."""

    license: Annotated[str | None, "such as mit", "ID"] = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: Annotated[str | None, "on the Hub; an adapter needs it", "ID"] = None
    base_model_relation: str | None = None
    datasets: Annotated[tuple[str, ...] | None, "on the Hub", "ID"] = None
    language: Annotated[tuple[str, ...] | None, "such as en", "CODE"] = None
    evaluations: Annotated[str | os.PathLike | None, "JSON with results", "FILE"] = None
    picture: str | None = None  # an image file in the folder


@dataclass(frozen=True)
class ReleaseOptions:
    """How to assemble a release."""

    tokenizer: Annotated[str | None, "folder of the tokenizer (default: that of the model)", "DIR"] = None
    card: Annotated[CardOverrides, "wins over card.json and README.md in the folder", "model card"] = field(
        default_factory=CardOverrides
    )
    own_template: Annotated[bool, "the chat template differs from the family's on purpose"] = False
    load_check: Annotated[bool, "do not load the release (needs memory for the model)"] = True


@dataclass(frozen=True)
class PushOptions:
    """Publish a checkpoint or an adapter on the Hub, checked before.

    Assemble what belongs to a release (weights, config, code, tokenizer, card), check it (loads without this
    package, same logits; no pickles, secrets, local paths or training state), show it, and publish it in one
    commit. An interrupted push goes on where it was. The token is that of `hf auth login` or HF_TOKEN.

    example: grinmoe push --model demo-output/model --repo my-grin-moe --private --dry-run
    """

    model: Annotated[str | os.PathLike, "folder of a checkpoint or a PEFT adapter", "DIR"]
    repo: Annotated[str, "NAME or OWNER/NAME; made if it is not there", "NAME"]
    private: Annotated[bool, "make the repository private"] = False
    # A pull request that is there (refs/pr/N) is a revision too.
    revision: Annotated[str | None, "branch; made if it is not there (default: main)", "BRANCH"] = None
    tag: Annotated[str | None, "tag the commit", "NAME"] = None
    create_pr: Annotated[bool, "open a pull request in place of a commit"] = False
    message: Annotated[str, "of the commit", "TEXT"] = "Upload GRIN-MoE"
    dry_run: Annotated[bool, "assemble, check and show; send nothing"] = False
    release: ReleaseOptions = field(default_factory=ReleaseOptions)

    def __post_init__(self):
        if self.create_pr and self.tag:
            raise ValueError(
                "--create-pr and --tag exclude each other: a pull request has no commit to tag before it is merged"
            )
        if self.create_pr and self.revision:
            raise ValueError("--create-pr and --revision exclude each other: a pull request is opened against main")
        if self.create_pr and self.private:
            raise ValueError(
                "--create-pr and --private exclude each other: a pull request is for a repository that is there"
            )
        for name, value in (("--tag", self.tag), ("--revision", self.revision)):
            if value is not None and not _REFERENCE.fullmatch(value):
                raise ValueError(
                    f"{name} {value!r} is no name for a git reference; use letters, digits, '.', '-' and '_'"
                )
        if self.revision and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"--revision {self.revision} is a commit, which cannot be changed; give a branch")
        if self.tag and self.tag == self.revision:
            raise ValueError(f"--tag and --revision are both {self.tag!r}; give the tag another name")
        if not self.message.strip():
            raise ValueError("--message is empty; say what this commit is")


@dataclass(frozen=True)
class PullOptions:
    """Download a checkpoint from the Hub, whole and checked.

    Download the files of a checkpoint, compare each with the size and hash that the Hub announces, and check that the
    weights are those of the config. Pickles, hidden files and other code are left out. The folder appears when it is
    complete; an interrupted pull goes on where it was.

    example: grinmoe pull --repo microsoft/GRIN-MoE --output GRIN-MoE
    """

    repo: Annotated[str, "OWNER/NAME on the Hub", "NAME"]
    output: NewFolder
    revision: Annotated[str | None, "branch, tag or commit (default: main)", "REF"] = None
