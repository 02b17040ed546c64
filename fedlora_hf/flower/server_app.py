"""The ServerApp: reads the run's configuration and hands over to `federate`."""
# SPDX-License-Identifier: Apache-2.0

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora_hf.launch.collecting import not_collecting

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the configuration describes; its output folder is on the server."""
    with not_collecting(own_process=True):
        from fedlora_hf.flower.federate import FlowerRun
        from fedlora_hf.flower.settings import read

    FlowerRun(grid, *read(context.run_config)).train()
