import sys

from fastllm.bench.gpu import main

sys.exit(main())
