"""The site's settings: `just docs`. Nothing is fetched, neither by the build nor by the pages."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "projected_grpo"
author = "the authors of projected_grpo"
extensions = ["myst_parser", "cli_reference", "api_reference"]
myst_heading_anchors = 3  # links into pages work as on a forge, and are checked
exclude_patterns = ["_build", "results/nano"]  # its tables are those of results.md
html_theme = "furo"
html_title = "projected_grpo"
html_copy_source = False
html_show_copyright = False
