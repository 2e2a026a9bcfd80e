"""Families of packages that are not installed here stay unread by doctest."""

collect_ignore_glob = ["families/*", "__main__.py"]
