"""The two entry points that vLLM finds. Both are called `apollo`: VLLM_PLUGINS is one list for all groups."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from apollo_ipc.config import load_config
from apollo_router.log import logger

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State

# Every process of vLLM imports this file, for register_loader. What only the API server needs is imported
# inside ApolloEndpoints: metrics made in an engine process would leave files in PROMETHEUS_MULTIPROC_DIR.


def register_loader() -> None:
    """`vllm.general_plugins`: makes `--load-format apollo` known, in every process of vLLM. Idempotent."""
    from apollo_router.export import register

    register()


class ApolloEndpoints:
    """`vllm.endpoint_plugins` (vllm/plugins/endpoint_plugins/interface.py): /train and /checkpoint.

    Configuration comes from the environment (APOLLO_CONFIG, APOLLO_SECTION__KEY), set by `apollo-ipc serve`.
    """

    name = "apollo"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        from apollo_router.gateway import Gateway

        try:
            self.gateway = Gateway(load_config())
        except Exception as error:
            # vLLM logs what a factory raises, skips it and serves on.
            logger.critical(
                "apollo-ipc: /train WILL BE MISSING from this server: %s. "
                "Correct it (APOLLO_CONFIG=%s) and start vLLM again.",
                error,
                os.environ.get("APOLLO_CONFIG", "unset"),
            )
            raise

    def attach_router(self, app: FastAPI) -> None:
        """Before the engine exists. The router's lifespan opens the ZMQ socket when the app starts."""
        from apollo_router import routes, teaching
        from apollo_router.fine_tuning import routes as fine_tuning
        from apollo_router.tinker import routes as tinker
        from apollo_router.ui import routes as ui

        app.state.apollo = self.gateway
        app.include_router(routes.router)
        app.include_router(ui.router)
        app.include_router(ui.open_router)
        app.include_router(fine_tuning.router)  # its lifespan inside that of the first
        app.include_router(tinker.router)
        app.include_router(teaching.router)
        if self.gateway.spool is not None:
            from apollo_router.traffic import TrafficRecorder

            key = self.gateway.config.traffic.unrecorded_key
            app.add_middleware(TrafficRecorder, spool=self.gateway.spool, unrecorded_key=key)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """After load and warm-up, once per API server, before the app starts.

        Raises ConfigError, which stops vLLM's start, where an inference key could train.
        """
        from apollo_router.auth import refuse_shared_key
        from apollo_router.gateway import VllmOptions
        from apollo_router.serving_options import tell_chat_options

        refuse_shared_key(self.gateway.train_key, args, os.environ.get("VLLM_API_KEY"))
        self.gateway.cache.set_engine(engine_client)
        self.gateway.model_names = getattr(args, "served_model_name", None) or [args.model]
        model_config = engine_client.model_config
        self.gateway.vllm = VllmOptions(
            getattr(args, "api_server_count", None) or 1,
            model_config.max_model_len,
            model_config.logprobs_mode,
        )
        tell_chat_options(self.gateway.config.runtime_dir, args)
