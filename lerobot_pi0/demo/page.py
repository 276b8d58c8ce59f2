"""The page that the demo ends with: results, the policy in action, training loss, what to type next."""

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from lerobot_pi0.demo.report import Table

TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 720px; padding: 1rem; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
img { max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .4rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
tr:last-child { font-weight: 600; }
pre { background: #f6f8fa; padding: .6rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.note { color: #555; font-size: .9rem; }
</style></head>
<body>
<h1>A small {{ title }}</h1>
{% if quick %}<p>A quick run: 10 training steps teach nothing. Leave out <code>--quick</code> for the real
one.</p>{% endif %}
<h2>Success in new scenes</h2>
<table>
<tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for note in table.notes %}<p class="note">{{ note }}</p>
{% endfor %}
<p>{{ reading }}</p>
{% if failures %}<h2>Failures</h2>
<img src="{{ failures }}" alt="Failed episodes">
<p class="note">The first failures of each task among the episodes that lerobot-eval films.</p>{% endif %}
<h2>The policy at work</h2>
<img src="policy.gif" alt="One episode of each task">
{% if loss %}<h2>Training loss</h2>
<img src="{{ loss }}" alt="Flow-matching loss by training step">{% endif %}
<h2>What to type next</h2>
<pre>{{ commands | join("\\n") }}</pre>
<p class="note">report: errors of predicted actions on recorded frames. language: whether the actions follow
the instruction. attention: where the policy looks.</p>
</body></html>
"""


def write_page(
    path: Path,
    title: str,
    table: Table,
    reading: str,
    failures: str | None,
    loss: str | None,
    commands: list[str],
    quick: bool,
) -> Path:
    """Write the page beside policy.gif and the other pictures, if there are any; returns its path.

    Args:
        path: of the page.
        title: as in "π0 in Meta-World".
        table: of successes.
        reading: how to read the table.
        failures: file name of the contact sheet of failures.
        loss: file name of the picture of the loss.
        commands: shell lines to type next.
        quick: says that the run teaches nothing.
    """
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE)
    page = template.render(
        title=title,
        table=table,
        reading=reading,
        failures=failures,
        loss=loss,
        commands=commands,
        quick=quick,
    )
    path.write_text(page, encoding="utf-8")
    return path
