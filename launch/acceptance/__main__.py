"""Run the command ``python -m launch.acceptance``."""

import sys

from launch.acceptance.main import main

sys.exit(main())
