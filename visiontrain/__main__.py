"""`python -m visiontrain` is the command line."""

import sys

from visiontrain.cli import main

sys.exit(main())
