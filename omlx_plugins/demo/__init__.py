"""The demonstration behind ``omlx-plugins demo``: one long context, asked about from everywhere."""
