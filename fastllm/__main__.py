import sys

from fastllm.cli import main

sys.exit(main())
