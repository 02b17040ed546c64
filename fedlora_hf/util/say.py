"""What is worth a line to whoever runs this: said once, by the first process, on the log (standard error)."""
# SPDX-License-Identifier: Apache-2.0

import logging
import os

logger = logging.getLogger("fedlora_hf")
_SAID: set[str] = set()


def say(text: str) -> None:
    """Log one line, a warning to Python's logging, unless it was said before."""
    if text not in _SAID and os.environ.get("RANK", "0") == "0":
        _SAID.add(text)
        logger.warning(text)
