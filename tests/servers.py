"""Web servers that tests ask."""

import contextlib
import http.server
import logging
import os
import sys


class Server(http.server.ThreadingHTTPServer):
    """Silent about a client that did not wait: the answer's thread may end within another test, whose stderr it is."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _silently(request, client_address):
    """As `Server`: a client need not read an answer to its end."""
    if not isinstance(sys.exception(), ConnectionError):
        raise


@contextlib.contextmanager
def cloud_storage(*buckets):
    """An emulator of Google Cloud Storage with these buckets, which gcsfs finds by itself."""
    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.server import create_server

    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # as ti_jax does before it imports gcsfs
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # what is not there is no fault
    server = create_server("localhost", 0, in_memory=True)
    for bucket in buckets:
        create_bucket(bucket, server._storage)
    server.start()
    server._api._httpd.handle_error = _silently
    server._api._httpd.socket.listen(64)  # of more connections than wait, some try again only after a second
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    os.environ["STORAGE_EMULATOR_HOST"] = f"http://localhost:{server._api._httpd.server_port}"
    try:
        yield
    finally:
        del os.environ["STORAGE_EMULATOR_HOST"]
        if before is not None:
            os.environ["STORAGE_EMULATOR_HOST"] = before
        server.stop()
