"""Web servers that tests ask."""

import http.server
import sys


class Server(http.server.ThreadingHTTPServer):
    """Silent about a client that did not wait: the answer's thread may end within another test, whose stderr it is."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
