"""The demonstration behind ``omlx-plugins demo``: one long context, asked about from everywhere."""

from omlx_plugins.demo.run import run

__all__ = ["run"]
