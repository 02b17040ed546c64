"""When a run goes to the Hub: rounds as they end, in the background, and the whole at the end."""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import TYPE_CHECKING

from fedlora_hf.errors import ConfigError
from fedlora_hf.hub import BackgroundPusher, push_folder
from fedlora_hf.util.progress import Progress

if TYPE_CHECKING:
    from fedlora_hf.config import FederatedConfig


class Publisher:
    """The pushes of one run, as `TrainingArguments` asks for them: push_to_hub, hub_model_id, hub_strategy,
    hub_private_repo, hub_token, hub_revision, hub_always_push; and our own, hub_with_clients and
    hub_with_client_facts. `progress` shows them."""

    def __init__(self, args: "FederatedConfig", progress: Progress) -> None:
        self.args, self._progress = args, progress
        self._background: BackgroundPusher | None = None

    def repo_id(self) -> str:
        """user/name: hub_model_id, else the output folder's name, of the user whose token it is."""
        name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        if "/" in name:
            return name
        from huggingface_hub import whoami
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

        try:
            return f"{whoami(self.args.hub_token)['name']}/{name}"
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
            reason = type(error).__name__
            raise ConfigError(
                f"hub_model_id={name!r}: whose it is cannot be asked of the Hub ({reason}); pass user/name"
            ) from None

    @property
    def pushes_rounds(self) -> bool:
        """Whether rounds are pushed as they end: every hub_strategy but "end"."""
        return bool(self.args.push_to_hub) and str(getattr(self.args.hub_strategy, "value", "")) != "end"

    def round(self, number: int) -> None:
        """Send the output folder, as it stands after a round, from a thread; the commit is tagged round-<number>."""
        if self._background is None:
            self._background = BackgroundPusher(
                self.repo_id(),
                private=self.private,
                with_clients=self.args.hub_with_clients,
                with_client_facts=self.args.hub_with_client_facts,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                always=bool(self.args.hub_always_push),
                progress=self._progress,
            )
        self._background.submit(self.args.output_dir, tag=f"round-{number}", commit_message=f"Round {number}")

    def wait(self) -> None:
        """Until what is under way in the background has arrived."""
        if self._background is not None:
            self._background.finish()
            self._background = None

    def push(
        self,
        message: str | None,
        *,
        token: str | None = None,
        revision: str | None = None,
        with_clients: bool = False,
        with_client_facts: bool = False,
    ) -> str:
        """Push the output folder now, as one commit; its address."""
        self.wait()
        return push_folder(
            self.args.output_dir,
            self.repo_id(),
            private=self.private,
            with_clients=with_clients or self.args.hub_with_clients,
            with_client_facts=with_client_facts or self.args.hub_with_client_facts,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=message,
            progress=self._progress,
        )

    @property
    def private(self) -> bool:
        """Private unless hub_private_repo says otherwise."""
        return self.args.hub_private_repo is not False
