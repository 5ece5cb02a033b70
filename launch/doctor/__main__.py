import sys

from launch.doctor.main import main

sys.exit(main())
