"""The trained form: a backbone with routers whose masks multiply."""
