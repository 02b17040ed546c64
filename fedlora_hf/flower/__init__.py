"""Real federation on Flower: clients on machines of their own, any method of ours on the server.

`client_app.app` and `server_app.app` are what a Flower project names (trainers/flower is one that is ready to run).
Flower carries the messages; what is trained, and how updates are aggregated, is the code of `fedlora train`.
"""
# SPDX-License-Identifier: Apache-2.0
