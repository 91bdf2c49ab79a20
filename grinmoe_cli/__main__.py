"""`python -m grinmoe_cli`, where `grinmoe` is not on the path."""

import sys

from grinmoe_cli import main

sys.exit(main())
