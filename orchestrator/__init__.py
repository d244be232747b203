"""The laptop side: starts runs, follows them and brings their rows home; never imports `worker` or torch."""
