"""The Gradio app: DHRD, its pooled baseline and CoT side by side.

`python -m app.app` serves the page on this machine's loopback address.
"""

import os

# Read when their packages are imported, so set before. No page view leaves the machine.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Gradio's table of calls serves a monitoring page that is off here; it would be summed up after each call.
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000")
