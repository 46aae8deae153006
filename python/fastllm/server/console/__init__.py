"""The console: a chat playground and live gauges in the browser, as files that are sent as they are."""
