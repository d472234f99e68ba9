"""
Where `twisted.plugin` finds custom routers.

Put a module with an `IRouterPlugin` into a directory
`strictproxy/plugins/` of your own package's installation; see
`examples/sticky-router`. This is no regular package: it has no modules of its
own that others could hide.
"""

from twisted.plugin import pluginPackagePaths

__path__.extend(pluginPackagePaths(__name__))
__all__: list[str] = []
