"""Makes the sticky router known to strictproxy. Found by twisted.plugin; keep imports few."""

from strictproxy_sticky import StickyPlugin

sticky = StickyPlugin()
