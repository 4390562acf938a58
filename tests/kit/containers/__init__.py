"""Debian roots with this project in them, booted by systemd-nspawn or only entered."""
