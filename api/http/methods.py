"""405 for method names that HTTP does not define; falcon 4.4 answers them 400.

falcon middleware, called once a route was found.
"""

from __future__ import annotations

from typing import Any

import falcon
import falcon.asgi


class UnknownMethods:
    """Refuses them, with the methods that the resource has in `Allow`."""

    async def process_resource(
        self, req: falcon.asgi.Request, _resp: falcon.asgi.Response, resource: Any, _params: dict[str, Any]
    ) -> None:
        """Raises:
        HTTPMethodNotAllowed: 405.
        """
        if req.method not in falcon.COMBINED_METHODS:
            allowed = [name for name in falcon.HTTP_METHODS if hasattr(resource, f"on_{name.lower()}")]
            raise falcon.HTTPMethodNotAllowed([*allowed, "OPTIONS"])
