"""Settings of `visiontrain federated` (imports no torch)."""

from __future__ import annotations

from typing import get_args

from pydantic import Field

from visiontrain.core.section import Section
from visiontrain.data.config import DataConfig
from visiontrain.strategies.federated.config import PARTS

SERVE = "127.0.0.1:9092"  # the world is let in by a word of the user's


class CertConfig(Section):
    """Certificates of a server."""

    keys: str = Field("keys", description="new folder for them, and for the keys of clients")
    hosts: list[str] = Field(
        [], description="names and addresses of the server; 127.0.0.1 and localhost are added"
    )


class KeyConfig(Section):
    """A client's key."""

    key: str = Field("client.key", description="new file for it; KEY.pub beside it is no secret")


class RegisterConfig(Section):
    """A client that may join."""

    key: str = Field(description="the .pub of a client; its name is the client's from now on")
    keys: str = Field("keys", description="folder that `federated cert` made")


class ClientConfig(Section):
    """A client: whom it works for, what it has, and what it agrees to."""

    server: str = Field(description="HOST:PORT of the server")
    ca: str = Field("ca.crt", description="ca.crt of the server: no other one is believed")
    key: str = Field("client.key", description="the client's key, as `federated key` made it")
    data: DataConfig = DataConfig()
    device: str = Field("auto", description="auto, cpu or cuda")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: all")
    out: str = Field("runs/client", description="folder for what the client keeps, and its log")
    models: list[str] = Field([], description="models that it agrees to train; default: any")
    share: list[PARTS] = Field(
        list(get_args(PARTS)), description="parts of a model that may leave; others stay here"
    )
    max_rounds: int | None = Field(
        None, ge=1, description="the longest run that it agrees to; default: any"
    )
    max_epochs: int | None = Field(
        None, ge=1, description="passes over its images in a run that it agrees to; default: any"
    )
    min_clients: int = Field(
        1, ge=1, description="results that the server must say it waits for in each round"
    )
    stay: bool = Field(False, description="wait for further runs when one is over")


CONFIGS: dict[str, type[Section]] = {
    "cert": CertConfig,
    "key": KeyConfig,
    "register": RegisterConfig,
    "client": ClientConfig,
}
CLIENT_USES = (
    *(name for name in ClientConfig.model_fields if name != "data"),
    *("data.source", "data.train_images", "data.val_images", "data.fraction", "data.workers"),
    *("data.cache", "data.cache_dir", "data.strict", "data.max_pixels", "data.single_cls"),
)
USES: dict[str, tuple[str, ...] | None] = {"client": CLIENT_USES}
EVERY = tuple(get_args(PARTS))
