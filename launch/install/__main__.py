import sys

from launch.install.main import main

sys.exit(main(sys.argv[1:]))
