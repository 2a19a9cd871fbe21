"""Settings that several commands share, each declared once (:mod:`launch.settings`)."""
