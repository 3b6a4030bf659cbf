"""How a report looks: on a screen, light or dark, and on paper."""

from __future__ import annotations

_LIGHT = """
  color-scheme: light;
  --page: #ffffff; --ink: #1b1f24; --muted: #57606a; --line: #d0d7de; --soft: #f4f6f8; --grid: #e4e8ec;
  --link: #0b5cad; --warn-page: #fff4e0; --warn-line: #b35c00;
  --c0: #0b6cb8; --c1: #c4500a; --c2: #00795a; --c3: #a8467d; --hit: #7fbdea; --miss: #f2a55a;
"""

_DARK = """
  color-scheme: dark;
  --page: #14181d; --ink: #e6eaee; --muted: #a3adb8; --line: #3a434d; --soft: #1d232a; --grid: #2a323a;
  --link: #79b8ff; --warn-page: #33260f; --warn-line: #f0a94f;
  --c0: #5fb2f5; --c1: #f2935c; --c2: #3fc79c; --c3: #e39bc6; --hit: #1f5f96; --miss: #96510f;
"""

STYLE = f"""
:root {{{_LIGHT}}}
@media screen and (prefers-color-scheme: dark) {{ :root {{{_DARK}}} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }}
main {{ max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.25rem; margin: 0 0 .75rem; }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 .5rem; }}
section {{ margin-top: 2.5rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }}
p {{ margin: .25rem 0 .75rem; max-width: 50rem; overflow-wrap: anywhere; }}
a {{ color: var(--link); }}
.note, figcaption, summary {{ color: var(--muted); font-size: .875rem; }}
nav ul {{
  display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; margin: 1rem 0 0; padding: 0;
  font-size: .875rem;
}}
.warnings {{
  background: var(--warn-page); border-left: .3rem solid var(--warn-line); padding: .75rem 1rem; margin: 1rem 0;
  break-inside: avoid;
}}
.warnings h3 {{ margin: 0 0 .25rem; }}
.warnings ul {{ margin: 0; padding-left: 1.25rem; overflow-wrap: anywhere; }}
.tiles {{
  display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .75rem;
  margin: 1rem 0; padding: 0; list-style: none;
}}
.tiles li {{ background: var(--soft); border-radius: .5rem; padding: .7rem .9rem; }}
.tiles b {{ display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }}
.tiles span {{ display: block; color: var(--muted); font-size: .8125rem; }}
dl {{ display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1.25rem; margin: .75rem 0; }}
dt {{ color: var(--muted); }}
dd {{ margin: 0; min-width: 0; overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }}
th, td {{
  padding: .3rem 1.25rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
}}
th {{ font-weight: 600; color: var(--muted); font-size: .8125rem; white-space: nowrap; }}
td {{ max-width: 28rem; overflow-wrap: break-word; }}
.right {{ text-align: right; }}
figure {{ margin: 1rem 0; break-inside: avoid; }}
figcaption {{ max-width: 50rem; margin-top: .25rem; overflow-wrap: anywhere; }}
details {{ margin: .5rem 0; }}
summary {{ cursor: pointer; }}
pre {{
  background: var(--soft); border-radius: .5rem; padding: .75rem 1rem; font-size: .8125rem; white-space: pre-wrap;
  overflow-wrap: anywhere;
}}
.pair {{
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 0 1.5rem;
  align-items: start;
}}
.cards {{
  display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem;
  padding: 0; margin: .75rem 0; list-style: none;
}}
.cards li {{
  background: var(--soft); border-radius: .5rem; padding: .6rem; font-size: .875rem; line-height: 1.4;
  overflow-wrap: anywhere; break-inside: avoid;
}}
.cards .picture {{ margin-bottom: .4rem; }}
.strips {{ margin: .75rem 0; padding: 0; list-style: none; }}
.strips > li {{
  display: grid; grid-template-columns: minmax(5rem, 9rem) 1fr; gap: 1rem; align-items: center; padding: .35rem 0;
  overflow-wrap: anywhere; break-inside: avoid;
}}
.strip {{ display: flex; flex-wrap: wrap; gap: .4rem; }}
.strip .picture {{ width: 5.5rem; }}
.picture {{
  display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--grid); border-radius: .25rem;
}}
.picture.small {{ image-rendering: pixelated; }}
.picture.missing {{
  padding: .4rem; overflow: hidden; color: var(--muted); font-size: .6875rem; line-height: 1.3;
  overflow-wrap: anywhere;
}}
svg {{ display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }}
svg .muted {{ fill: var(--muted); }}
svg .grid {{ stroke: var(--grid); fill: none; }}
svg .axis {{ stroke: var(--muted); fill: none; }}
svg .guide {{ stroke: var(--muted); fill: none; stroke-dasharray: 4 4; }}
svg .hit {{ fill: var(--hit); }}
svg .miss {{ fill: var(--miss); }}
svg .curve {{ fill: none; stroke-width: 2; stroke-linejoin: round; }}
svg .dots {{ fill: none; stroke-width: 4; stroke-linecap: round; stroke-opacity: .75; }}
svg .dots.large {{ stroke-width: 9; stroke-opacity: 1; }}
svg .whisker {{ fill: none; stroke-width: 2; stroke-opacity: .45; }}
svg .s0 {{ stroke: var(--c0); }}
svg .s1 {{ stroke: var(--c1); }}
svg .s2 {{ stroke: var(--c2); }}
svg .s3 {{ stroke: var(--c3); }}
svg .curve.s1 {{ stroke-dasharray: 7 4; }}
svg .curve.s2 {{ stroke-dasharray: 2 3; }}
svg .curve.s3 {{ stroke-dasharray: 9 3 2 3; }}
svg .bar {{ fill: var(--c0); }}
@media screen and (max-width: 40rem) {{
  dl {{ grid-template-columns: minmax(5rem, 38%) 1fr; column-gap: .75rem; }}
  th, td {{ padding-right: .75rem; }}
  table {{ font-size: .875rem; }}
  .strips > li {{ grid-template-columns: 1fr; gap: .25rem; }}
}}
@media print {{
  body {{ font-size: 11pt; }}
  main {{ max-width: none; padding: 0; }}
  nav, details:not([open]):not(.rest) {{ display: none; }}
  .scroll {{ overflow: visible; }}
  svg {{ min-width: 0 !important; max-height: 20cm; }}
  tr {{ break-inside: avoid; }}
  h2, h3 {{ break-after: avoid; }}
  svg, .tiles li, .cards li, .warnings, .picture {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
}}
"""
"""The style sheet. Colours are told apart with any colour vision, curves also by their dashes."""
