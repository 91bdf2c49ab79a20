"""Formats of tokens and keys, as their issuers document them. docs/hub.md lists them; a test compares the two."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

LETTERS, URL_LETTERS, HEX, BASE64 = "A-Za-z0-9", "A-Za-z0-9_-", "0-9a-f", "A-Za-z0-9+/=_-"


@dataclass(frozen=True)
class SecretFormat:
    """
    What one issuer's secrets look like.

    Attributes:
        issuer: for messages and docs.
        form: in words, for docs.
        source: regular expression. Its group `value`, if it has one, is the secret itself.
        hints: texts of which at least one is in every match, in lower case; none: the expression is always tried.
    """

    issuer: str
    form: str
    source: str
    hints: tuple[str, ...] = ()

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(self.source)


def _prefixed(issuer: str, prefixes: str, letters: str, least: int, exact: bool = False) -> SecretFormat:
    """Secrets that begin with one of the prefixes and go on with at least (or exactly) so many of the letters."""
    names = prefixes.split()
    form = f"{', '.join(f'`{name}`' for name in names)}, then {least}{'' if exact else ' or more'} of `{letters}`"
    start = "|".join(map(re.escape, names))
    many = f"{{{least}}}(?![A-Za-z0-9])" if exact else f"{{{least},}}"
    return SecretFormat(
        issuer, form, rf"(?<![A-Za-z0-9])(?:{start})[{letters}]{many}", tuple(name.lower() for name in names)
    )


_NAMES = (
    "api[_-]?key|access[_-]?key|account[_-]?key|private[_-]?key|signing[_-]?key|encryption[_-]?key|subscription[_-]?key|"
    "secret(?:[_-]?key)?|_?auth[_-]?token|token|passwd|password|passphrase|pwd|credentials?"
)
FORMATS = (
    # AI services
    _prefixed("Hugging Face", "hf_ api_org_", LETTERS, 30),
    SecretFormat(
        "OpenAI, Anthropic, DeepSeek, OpenRouter",
        "`sk-`, then 20 or more of `A-Za-z0-9_-` with a digit",
        r"(?<![A-Za-z0-9-])sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}",
        ("sk-",),
    ),
    _prefixed("Google, API key", "AIza", URL_LETTERS, 35),
    _prefixed("Google, API key of 2025", "AQ.Ab8", URL_LETTERS, 30),
    _prefixed("Google, OAuth", "GOCSPX- ya29. 1//0", URL_LETTERS, 20),
    _prefixed("Replicate", "r8_", LETTERS, 37),
    _prefixed("Groq", "gsk_", LETTERS, 40),
    _prefixed("xAI", "xai-", LETTERS, 60),
    _prefixed("Perplexity", "pplx-", LETTERS, 40),
    _prefixed("NVIDIA", "nvapi-", URL_LETTERS, 40),
    _prefixed("ElevenLabs", "sk_", HEX, 48),
    _prefixed("Pinecone", "pcsk_", URL_LETTERS, 50),
    _prefixed("LangSmith", "lsv2_pt_ lsv2_sk_", "0-9a-f_", 40),
    _prefixed("Kaggle", "KGAT_", HEX, 32),
    _prefixed("RunPod", "rpa_", "A-Z0-9a-z", 40),
    _prefixed("Prefect", "pnu_ pnb_", LETTERS, 36),
    SecretFormat(
        "Weights & Biases",
        "`wandb_v1_`, then 30 or more of `A-Za-z0-9_`; or 40 of `0-9a-f` after `wandb login`",
        r"wandb_v1_[A-Za-z0-9_]{30,}|wandb[ .]login[^\n]{0,40}?(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])",
        ("wandb",),
    ),
    # code and packages
    _prefixed("GitHub", "ghp_ gho_ ghu_ ghs_ ghr_", "A-Za-z0-9_", 30),
    _prefixed("GitHub, fine-grained", "github_pat_", "A-Za-z0-9_", 30),
    _prefixed(
        "GitLab",
        "glpat- gldt- glrt- glcbt- glptt- glft- glsoat- glagent- glimt- glffct- glrtr- gloas- GR1348941",
        "A-Za-z0-9_=.-",
        20,
    ),
    _prefixed("Bitbucket, Atlassian", "ATBB ATATT3 ATCTT3", "A-Za-z0-9_=-", 28),
    _prefixed("PyPI", "pypi-AgE", URL_LETTERS, 20),
    _prefixed("npm", "npm_", LETTERS, 36),
    _prefixed("RubyGems", "rubygems_", HEX, 48),
    _prefixed("crates.io", "cio", LETTERS, 32, exact=True),
    _prefixed("NuGet", "oy2", "a-z0-9", 43, exact=True),
    _prefixed("Docker Hub", "dckr_pat_ dckr_oat_", URL_LETTERS, 27),
    _prefixed("JFrog", "AKCp cmVmdGtu", LETTERS, 50),
    _prefixed("CircleCI, Buildkite", "CCIPAT_ CCIPRJ_ bkua_", "A-Za-z0-9_", 40),
    # clouds
    SecretFormat(
        "AWS",
        "`AKIA`, `ASIA`, `ABIA`, `ACCA`, then 16 of `A-Z0-9`; `ABSK`, then 100 or more of `A-Za-z0-9+/=`",
        r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}(?![0-9A-Za-z])|ABSK[A-Za-z0-9+/=]{100,})",
        ("akia", "asia", "abia", "acca", "absk"),
    ),
    SecretFormat(
        "Azure, keys",
        "`AccountKey=` or `SharedAccessKey=`, then 40 or more of `A-Za-z0-9+/=`; 84 or 88 characters with one of the "
        "signatures `AZDO`, `JQQJ99`, `+ASt`, `ACDb`, `+ABa`, `+AMC`, `APIM`, `AzFu`, `AzSe`",
        r"(?i:(?:Account|SharedAccess)Key=)[A-Za-z0-9+/=]{40,}|(?<![A-Za-z0-9])(?:[A-Za-z0-9]{76}AZDO[A-Za-z0-9]{4}"
        r"|[A-Za-z0-9]{52}JQQJ9[9D][A-Za-z0-9]{24,28}"
        r"|[A-Za-z0-9+/]{76}(?:APIM|ACDb|\+ABa|\+AMC|\+ASt)[A-Za-z0-9+/]{6}(?:==)?"
        r"|[A-Za-z0-9_-]{42,44}(?:AzFu|AzSe)[A-Za-z0-9+/_-]{5,6}(?:==)?)",
        ("accountkey=", "sharedaccesskey=", "azdo", "jqqj9", "apim", "acdb", "+aba", "+amc", "+ast", "azfu", "azse"),
    ),
    SecretFormat(
        "Azure, client secret",
        "3 characters, a digit, `Q~`, then 31 or more of `A-Za-z0-9_~.-`",
        r"(?<![A-Za-z0-9_~.-])[A-Za-z0-9_~.]{3}\dQ~[A-Za-z0-9_~.-]{31,}",
        ("q~",),
    ),
    _prefixed("DigitalOcean", "dop_v1_ doo_v1_ dor_v1_", HEX, 64),
    _prefixed("Databricks", "dapi dose dkea", HEX, 32),
    _prefixed("Alibaba, Tencent", "LTAI AKID", LETTERS, 20),
    _prefixed("Yandex", "AQVN y0_", URL_LETTERS, 35),
    _prefixed("Scaleway", "SCW", "A-Z0-9", 17, exact=True),
    _prefixed("Heroku", "HRKU-", URL_LETTERS, 36),
    _prefixed("Netlify", "nfp_", LETTERS, 36),
    _prefixed("Vercel", "vercel_blob_rw_", "A-Za-z0-9_", 30),
    _prefixed("Fly.io", "fm1_ fm1r_ fm2_ fo1_", BASE64, 40),
    _prefixed("Supabase", "sbp_ sb_secret_", "A-Za-z0-9_-", 22),
    _prefixed("PlanetScale", "pscale_tkn_ pscale_pw_ pscale_oauth_", "A-Za-z0-9_.=-", 32),
    _prefixed("Cloudflare", "cfut_ cfat_ cfk_", URL_LETTERS, 40),
    SecretFormat(
        "Cloudflare, origin key",
        "`v1.0-`, 24 of `0-9a-f`, `-`, 146 of `0-9a-f`",
        r"(?<![\w.])v1\.0-[0-9a-f]{24}-[0-9a-f]{140,}",
        ("v1.0-",),
    ),
    _prefixed("HashiCorp Vault", "hvs. hvb. hvr.", URL_LETTERS, 24),
    SecretFormat(
        "Terraform Cloud",
        "14 of `A-Za-z0-9`, `.atlasv1.`, then 60 or more of `A-Za-z0-9_=-`",
        r"[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{60,}",
        (".atlasv1.",),
    ),
    _prefixed("Pulumi", "pul-", HEX, 40),
    _prefixed("Doppler", "dp.pt. dp.st. dp.ct. dp.sa. dp.scim. dp.audit.", "A-Za-z0-9._-", 40),
    _prefixed("1Password", "ops_eyJ", BASE64, 100),
    _prefixed("Tailscale", "tskey-auth- tskey-api- tskey-client- tskey-scim- tskey-webhook-", URL_LETTERS, 20),
    # messages and mail
    SecretFormat(
        "Slack",
        "`xox` and a letter, `-`, then 10 or more of `A-Za-z0-9-`; `xapp-` and a digit, `-`, then 20 or more; addresses "
        "`hooks.slack.com/services/...`, `/workflows/...`, `/triggers/...`",
        r"(?<![A-Za-z0-9])(?:xox[a-z](?:\.xox[a-z])?-[A-Za-z0-9%-]{10,}|xapp-\d-[A-Za-z0-9-]{20,})"
        r"|hooks\.slack(?:-gov)?\.com/(?:services|workflows|triggers)/[A-Za-z0-9_-]{8,}/[A-Za-z0-9_/-]{8,}",
        ("xox", "xapp-", "hooks.slack"),
    ),
    SecretFormat(
        "Discord",
        "addresses `discord.com/api/webhooks/...`; three parts of `A-Za-z0-9_-` with `.` between them, of 24 to 28, 6 and "
        "27 or more characters, of which the first begins with `M`, `N` or `O` and has a digit",
        r"discord(?:app)?\.com/api/(?:v\d+/)?webhooks/\d{15,20}/[A-Za-z0-9_-]{40,}"
        r"|(?<![A-Za-z0-9_.-])[MNO](?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,}",
    ),
    SecretFormat(
        "Microsoft Teams, Zapier",
        "addresses `webhook.office.com/webhookb2/...` and `hooks.zapier.com/hooks/catch/...`",
        r"webhook\.office(?:365)?\.com/webhookb2/[\w@-]{30,}/[\w/-]{20,}|hooks\.zapier\.com/hooks/catch/\d+/\w+",
        ("webhook.office", "hooks.zapier"),
    ),
    SecretFormat(
        "Telegram",
        "8 to 10 digits, `:AA`, then 32 or more of `A-Za-z0-9_-`",
        r"(?<![A-Za-z0-9])\d{8,10}:AA[A-Za-z0-9_-]{32,}",
        (":aa",),
    ),
    SecretFormat(
        "SendGrid",
        "`SG.`, 16 or more of `A-Za-z0-9_-`, `.`, 16 or more of `A-Za-z0-9_-`",
        r"(?<![A-Za-z0-9])SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
        ("sg.",),
    ),
    SecretFormat("Twilio", "`SK`, then 32 of `0-9a-f`", r"(?<![A-Za-z0-9])SK[0-9a-f]{32}(?![A-Za-z0-9])", ("sk",)),
    SecretFormat(
        "Mailgun, Mailchimp",
        "`key-`, then 32 of `0-9a-f`; 32 of `0-9a-f`, then `-us` and a number or `-`, 8, `-`, 8 of `0-9a-f`",
        r"(?<![A-Za-z0-9])(?:key-[0-9a-f]{32}(?![0-9a-f])|[0-9a-f]{32}-(?:us\d{1,2}(?!\w)|[0-9a-f]{8}-[0-9a-f]{8}(?!\w)))",
    ),
    _prefixed("Brevo", "xkeysib- xsmtpsib-", "0-9A-Za-z-", 64),
    SecretFormat(
        "Resend",
        "`re_`, 8 of `A-Za-z0-9`, `_`, 24 of `A-Za-z0-9`",
        r"(?<![A-Za-z0-9])re_[A-Za-z0-9]{8}_[A-Za-z0-9]{24}(?![A-Za-z0-9_])",
        ("re_",),
    ),
    # payment and other services
    _prefixed("Stripe", "sk_live_ sk_test_ sk_prod_ rk_live_ rk_test_ rk_prod_", LETTERS, 10),
    _prefixed("Stripe, webhooks", "whsec_", BASE64, 24),
    _prefixed("Square", "sq0atp- sq0csp- EAAA", URL_LETTERS, 22),
    _prefixed("PayPal, Braintree", "access_token$production$ access_token$sandbox$", "0-9a-z$", 32),
    _prefixed("Shopify", "shpat_ shpca_ shppa_ shpss_ shptka_", "0-9a-fA-F", 32),
    _prefixed("Facebook", "EAA", LETTERS, 100),
    _prefixed("Dropbox", "sl.", URL_LETTERS, 100),
    _prefixed("Grafana", "glsa_ glc_", BASE64, 32),
    _prefixed("Sentry", "sntrys_ sntryu_", BASE64, 40),
    _prefixed("New Relic", "NRAK-", "A-Z0-9", 27),
    SecretFormat(
        "Dynatrace",
        "`dt0`, a letter and two digits, `.`, 24 of `A-Z0-9`, `.`, 64 of `A-Z0-9`",
        r"(?<![A-Za-z0-9])dt0[a-z]\d\d\.[A-Z0-9]{24}\.[A-Z0-9]{60,}",
        ("dt0",),
    ),
    _prefixed("Linear", "lin_api_ lin_oauth_", LETTERS, 32),
    _prefixed("Notion", "ntn_ secret_", LETTERS, 40),
    _prefixed("Figma", "figd_", URL_LETTERS, 40),
    SecretFormat(
        "Airtable",
        "`pat`, 14 of `A-Za-z0-9`, `.`, 64 of `0-9a-f`",
        r"(?<![A-Za-z0-9])pat[A-Za-z0-9]{14}\.[0-9a-f]{64}",
        ("pat",),
    ),
    _prefixed("Postman", "PMAK-", "0-9a-f-", 50),
    _prefixed("HubSpot", "pat-na1- pat-na2- pat-eu1-", "0-9a-f-", 36),
    _prefixed("Contentful", "CFPAT-", URL_LETTERS, 40),
    # of any issuer
    SecretFormat(
        "JSON Web Token",
        "`eyJ`, then three parts of `A-Za-z0-9_-` with `.` between them",
        r"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{12,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
        ("eyj",),
    ),
    SecretFormat(
        "private key",
        "blocks `BEGIN ... PRIVATE KEY` (PEM, OpenSSH, PGP, SSH2, also in base64), `PuTTY-User-Key-File`, "
        "`AGE-SECRET-KEY-1`, `BEGIN OpenVPN Static key`, `PrivateKey = ` of WireGuard, `client-key-data:` of Kubernetes",
        r"-{4,5} ?BEGIN [A-Za-z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)? ?-{4,5}|PuTTY-User-Key-File-\d"
        r"|AGE-SECRET-KEY-1[A-Z0-9]{50,}|-BEGIN OpenVPN Static key|\bPrivateKey\s*=\s*[A-Za-z0-9+/]{43}="
        r"|client-key-data[\"']?:\s*[\"']?[A-Za-z0-9+/=]{40,}|b3BlbnNzaC1rZXktdjE[A-Za-z0-9+/]{20,}"
        r"|LS0tLS1CRUdJTi(?!BDRVJU|BQVUJMSUMg)[A-Za-z0-9+/]{20,}",
        ("private key", "putty-user", "age-secret", "openvpn", "privatekey", "client-key-data", "b3blbn", "ls0tls1c"),
    ),
    SecretFormat(
        "token in a header",
        "`Authorization`, then `Bearer`, `Basic`, `Token` or `ApiKey` and 16 or more characters",
        r"(?i)\bauthorization\b\W{1,4}(?:bearer|basic|token|apikey)\s+[A-Za-z0-9._~+/=-]{16,}",
        ("authorization",),
    ),
    SecretFormat(
        "signed address",
        "`X-Amz-Signature=`, `X-Goog-Signature=`, `Signature=` or `sig=` in an address, as of S3, Google Cloud and an Azure "
        "SAS",
        r"(?:[?&;]|&amp;|^|\s)(?:X-Amz-Signature|X-Goog-Signature|Signature|sig)=[A-Za-z0-9%/+=_-]{20,}",
        ("signature=", "sig="),
    ),
    # A name that says so, and a value that is no word: letters and digits.
    SecretFormat(
        "key or password by its name",
        "`api_key`, `access_key`, `account_key`, `private_key`, `secret`, `token`, `password`, `pwd`, `passphrase`, "
        "`credentials` and the like, `:` or `=`, then 16 or more characters, both letters and digits",
        rf"(?i)(?<![a-z])(?:[a-z0-9_-]{{0,40}}[_-])?(?:{_NAMES})\b[\"']?\s*[:=]\s*[\"']?"
        r"(?P<value>(?=[a-z/+_=-]*\d)(?=[\d/+_=-]*[a-z])[a-z0-9/+_=-]{16,})",
        ("key", "secret", "token", "passw", "passphrase", "pwd", "credential"),
    ),
    SecretFormat(
        "password of a connection",
        "`Server=...;...Password=...`, also `Host=`, `Data Source=`, `Pwd=`",
        r"(?i)\b(?:server|host|data source)=[^;\s]{1,200};[^\n]{0,300}?\b(?:password|pwd)=(?P<value>[^;\s\"'$<{]{4,})",
        ("password=", "pwd="),
    ),
    SecretFormat(
        "password of .netrc",
        "`machine ... login ... password ...`",
        r"\bmachine\s{1,9}\S{1,200}\s{1,9}login\s{1,9}\S{1,200}\s{1,9}password\s{1,9}(?P<value>\S{4,})",
        ("machine",),
    ),
    SecretFormat(
        "password of a container registry",
        '`"auth": "` and 16 or more of `A-Za-z0-9+/=`',
        r"\"auth\"\s*:\s*\"(?=[A-Za-z+/]*\d)[A-Za-z0-9+/]{16,}={0,2}\"",
        ('"auth"',),
    ),
    SecretFormat(
        "credentials in an address",
        "`scheme://name:password@host`",
        r"\b[a-z][a-z0-9+.-]{0,20}://[^/\s:@\"'<>{}$]{0,200}:[^/\s:@\"'<>{}$]{1,200}@[\w\[]",
        ("://",),
    ),
)
