"""What an operator may set, by environment (``TRUNKLINE_CLUSTER_...``), by a TOML file or on the command line.

The command line wins over the environment, the environment over the file named by ``TRUNKLINE_CLUSTER_CONFIG``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource
from trunkline_wire.errors import WireError
from trunkline_wire.local import state_dir
from trunkline_wire.names import check_backbone_name

from trunkline_worker.backbones.manifest import load_manifest
from trunkline_worker.engine.runtime_names import check_runtime
from trunkline_worker.serving.addresses import parse_ports
from trunkline_worker.serving.direct import DirectConfig
from trunkline_worker.serving.server import Listener

CONFIG_VARIABLE = "TRUNKLINE_CLUSTER_CONFIG"
"""Names the TOML file."""


class Settings(BaseSettings):
    """All settings of a cluster. Every field is documented in ``docs/operations.md``; a test compares the two."""

    model_config = SettingsConfigDict(env_prefix="TRUNKLINE_CLUSTER_", extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address that the gateway listens on.")
    port: int = Field(50051, ge=0, le=65535, description="Port of the gateway; 0 takes a free one.")
    token_file: str | None = Field(None, description="File of tokens, one per line: `token [tenant [reader|user]]`.")
    tls_cert: str | None = Field(None, description="PEM file with the gateway's certificate chain.")
    tls_key: str | None = Field(None, description="PEM file with its private key.")
    tls_client_ca: str | None = Field(None, description="PEM file; clients must show a certificate of this authority.")
    insecure: bool = Field(False, description="Allow plaintext beyond loopback, or no tokens.")

    direct: bool = Field(True, description="Whether backbone replicas listen themselves, for calls past the gateway.")
    direct_host: str = Field(
        "", description="Address that they listen on. Default: loopback if the gateway's is, else their machine's own."
    )
    direct_ports: str = Field("", description="Their ports, as `50100-50163`. Default: any that is free.")
    direct_tls_name: str = Field(
        "", description="Name in the certificate that clients check there. Default: its first DNS name."
    )

    backbones: tuple[str, ...] = Field(("efficientnet_lite0",), description="Backbones to serve, the default first.")
    own_backbones: tuple[str, ...] = Field(
        default_factory=tuple,
        description="Manifests of your own backbones, or their folders; they are served besides `backbones`.",
    )
    samples: str = Field("", description="Folder of pictures that errors are measured on. Default: generated pictures.")
    weights: dict[str, str] = Field(default_factory=dict, description="Backbone name to a local file of weights.")
    allow_untrained: bool = Field(False, description="Serve backbones that have no pretrained weights.")
    device: str = Field("auto", description="`auto`, `cpu` or `cuda`.")
    num_threads: int = Field(
        0, ge=0, description="CPU threads of a backbone replica; 0: an equal share of the machine's, on a GPU all."
    )
    runtimes: dict[str, str] = Field(
        default_factory=dict,
        description="Backbone name to the runtime that it must use. Default: the best, as measured.",
    )
    max_queued_rows: int = Field(4096, ge=1, description="Rows that may wait for a backbone; more must retry.")
    head_capacity: int = Field(1024, ge=1, description="Heads that a backbone replica keeps in memory.")
    head_memory_mb: int = Field(1024, ge=1, description="MiB that these heads take at most.")

    storage: str = Field(
        "", description="fsspec URL for chunks, stems and models. Default: `data` in the state folder."
    )
    database: str = Field("", description="SQLAlchemy URL for metadata. Default: SQLite in the state folder.")

    gateway_replicas: int = Field(1, ge=1, description="Gateway replicas; two or more survive the loss of one.")
    backbone_replicas: int = Field(1, ge=1, description="Replicas of each backbone.")
    gpus_per_backbone: float = Field(
        -1.0, ge=-1, description="GPUs that a backbone replica reserves; -1: an equal share of all, one at most."
    )
    lanes: int = Field(1, ge=1, description="Lanes: resident Ray Train runs that train heads, one job at a time each.")
    lane_threads: int = Field(1, ge=0, description="CPU threads of a lane; 0: all that the machine has.")
    lane_idle_s: float = Field(0.0, ge=0, description="Seconds without work after which a lane ends; 0: never.")
    tuning_runs: int = Field(1, ge=0, description="Fine-tuning jobs at a time; they wait for no lane. 0: none at all.")
    tuning_workers: int = Field(1, ge=1, description="Workers of a fine-tuning run, at most.")
    tuning_cpus: float = Field(1.0, gt=0, description="CPUs that each of them reserves where it has no GPU.")
    tuning_gpus: float = Field(
        -1.0, ge=-1, description="GPUs that each of them reserves; -1: a tenth of one where there are any; 0: none."
    )
    tuning_memory_mb: int = Field(8192, ge=1, description="MiB in each of them for the features that it trains on.")
    lease_s: float = Field(10.0, ge=1, description="Seconds without a sign of life after which a job is taken back.")

    dashboard_port: int = Field(0, ge=0, le=65535, description="Port of Ray's dashboard on loopback; 0: a free one.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Level of the workers' logs.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: arguments, environment, file."""
        path = os.environ.get(CONFIG_VARIABLE)
        if path and not Path(path).is_file():
            raise ValueError(f"{CONFIG_VARIABLE} names {path}, which is not a file")
        sources = [init_settings, env_settings]
        if path:
            sources.append(TomlConfigSettingsSource(settings_cls, Path(path)))
        return tuple(sources)

    @field_validator("direct_ports")
    @classmethod
    def _direct_ports(cls, text: str) -> str:
        parse_ports(text)
        return text

    @field_validator("backbones")
    @classmethod
    def _backbones(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or len(set(names)) != len(names):
            raise ValueError("name one backbone or more, each once")
        for name in names:
            try:
                check_backbone_name(name)
            except WireError as error:  # pydantic reports ValueError with the setting's name
                raise ValueError(error.message) from error
        return names

    @field_validator("own_backbones")
    @classmethod
    def _own_backbones(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        # Read later by processes with other working folders.
        return tuple(str(Path(path).absolute()) for path in paths)

    @field_validator("samples")
    @classmethod
    def _samples(cls, path: str) -> str:
        if path and not Path(path).is_dir():
            raise ValueError(f"{path} is not a folder; name one with pictures")
        return str(Path(path).absolute()) if path else ""

    @model_validator(mode="after")
    def _own_names(self) -> Settings:
        names: list[str] = []
        for path in self.own_backbones:
            try:
                name = load_manifest(path).name
            except WireError as error:
                raise ValueError(error.message) from error
            if name in names:
                raise ValueError(f"two of your own backbones are called {name!r}; each needs a name of its own")
            if name in self.weights:
                raise ValueError(
                    f"the weights of {name!r} are named in its manifest, {path}; they cannot be given here"
                )
            names.append(name)
        # Whoever lists them among the backbones chooses the order; the others come last.
        others = tuple(name for name in names if name not in self.backbones)
        object.__setattr__(self, "backbones", (*self.backbones, *others))  # settings are frozen from here on
        return self

    @model_validator(mode="after")
    def _weights(self) -> Settings:
        for name in self.weights:
            if name not in self.backbones:
                raise ValueError(f"weights are given for {name!r}, which is not among the backbones")
        return self

    @model_validator(mode="after")
    def _runtimes(self) -> Settings:
        for name, runtime in self.runtimes.items():
            if name not in self.backbones:
                raise ValueError(f"a runtime is given for {name!r}, which is not among the backbones")
            try:
                check_runtime(runtime)
            except WireError as error:
                raise ValueError(error.message) from error
        return self

    def manifest_of(self, backbone: str) -> str | None:
        """Return the manifest of a backbone of the operator's own, or None for another."""
        return next((path for path in self.own_backbones if load_manifest(path).name == backbone), None)

    @property
    def storage_url(self) -> str:
        """Return the URL of the blob store."""
        return self.storage or f"file://{state_dir().absolute() / 'data'}"

    @property
    def database_url(self) -> str:
        """Return the URL of the metadata database."""
        return self.database or f"sqlite:///{state_dir().absolute() / 'metadata.sqlite'}"

    @property
    def direct_config(self) -> DirectConfig | None:
        """Return how backbone replicas listen; None if they do not."""
        if not self.direct:
            return None
        # What does not concern them is left out: replicas start anew when their settings change.
        gateway = replace(self.listener, port=0, token_file=None)
        return DirectConfig(gateway, self.direct_host, parse_ports(self.direct_ports), self.direct_tls_name)

    @property
    def listener(self) -> Listener:
        """Return where and how the gateway listens."""
        return Listener(
            host=self.host,
            port=self.port,
            token_file=self.token_file,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            tls_client_ca=self.tls_client_ca,
            insecure=self.insecure,
        )
