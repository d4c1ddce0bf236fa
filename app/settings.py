"""Settings: where the app reads runs, who may log in, and the limits on what it takes at once."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from dhrd_lib.config import Config, ConfigError, Name

MAX_CHARACTERS = 8_000  # of one text
MAX_ROWS = 5_000  # of one file
MAX_FILE_MIB = 20
MAX_WAITING = 32  # queued calls; further ones are rejected as busy
MAX_FIELDS = 6  # texts that a template may read
MAX_NEW_TOKENS = 500  # the paper's budget of CoT
KEPT_MODELS = 3  # in memory at once: one per system on the page


class Settings(Config):
    """What the environment or the command line decides.

    `runs` is the folder of runs, `results` that of the stored ablations, and `backbone` serves zero-shot CoT where
    there is no run. Raises `ConfigError` for a user without a password or the reverse, and for a host that other
    machines reach without both.
    """

    runs: Path = Path("runs")
    results: Path = Path("notebooks/results")
    backbone: Name = "smollm2-135m"
    host: Name = "127.0.0.1"
    port: int | None = None
    user: str | None = None
    password: str | None = Field(default=None, repr=False)

    @model_validator(mode="after")
    def _check_access(self) -> Settings:
        if bool(self.user) != bool(self.password):
            present, missing = ("user", "password") if self.user else ("password", "user")
            raise ConfigError(f"There is a {present} and no {missing}; expected both, or neither.")
        if not self.user and self.host not in ("127.0.0.1", "localhost", "::1"):
            wanted = "DHRD_APP_USER and DHRD_APP_PASSWORD with it, or 127.0.0.1"
            raise ConfigError(f"host is {self.host!r}, which other machines reach; expected {wanted}.")
        return self
