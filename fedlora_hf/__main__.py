"""`python -m fedlora_hf`: the command line, the same as `fedlora`."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
