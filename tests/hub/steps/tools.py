"""What the step files share: the hub's test controls, and how an error reads."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import urllib.request

ENDPOINT = os.environ["HF_ENDPOINT"]


def control(path, body):
    request = urllib.request.Request(f"{ENDPOINT}/_test/{path}", json.dumps(body).encode(), method="POST")
    return json.loads(urllib.request.urlopen(request).read())


def fault(match, do, **details):
    control("fault", {"match": match, "do": do, **details})


def requests_seen():
    """ "METHOD path" of every request since the last call."""
    return control("log", {})


def error_of(call, *arguments, **options):
    """The type and text of what `call` raises."""
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
