"""Findings as a page of text, and as JSON."""

import json
from textwrap import fill
from typing import Any

from lerobot_pi0.tools.doctor.checks import Answer
from lerobot_pi0.tools.doctor.finding import Severity
from lerobot_pi0.tools.doctor.inputs import Inputs

WIDTH = 100
_LABEL = 16


def page(inputs: Inputs, answers: list[Answer]) -> str:
    """What was examined, what is wrong with it, worst first, and what is in order, area by area."""
    parts = ["\n".join(_row(name, text) for name, text in about(inputs).items()), _verdict(answers)]
    for number, answer in enumerate(_of(answers, Severity.ERROR, Severity.WARNING, Severity.NOTE), 1):
        finding = answer.finding
        title = fill(f"{number}. {finding.severity.upper()}  {finding.what}", WIDTH, subsequent_indent="   ")
        rows = [_row(name, text, 3) for name, text in (("", finding.evidence), ("fix", finding.fix)) if text]
        parts.append("\n".join([title, *rows]))
    if fine := _of(answers, Severity.FINE):
        rows, last = [], ""
        for answer in fine:
            area = answer.check.area
            rows.append(_row("" if area == last else area, answer.finding.what, 2))
            last = area
        parts.append("\n".join(["In order", *rows]))
    if left_out := _left_out(inputs):
        parts.append(left_out)
    return "\n\n".join(parts)


def as_json(inputs: Inputs, answers: list[Answer]) -> str:
    """The same for machines: {"examined": {…}, "findings": [{check, severity, what, evidence, fix}, …]}."""
    findings: list[dict[str, Any]] = [
        {
            "check": answer.check.name,
            "severity": answer.finding.severity,
            "what": answer.finding.what,
            "evidence": answer.finding.evidence,
            "fix": answer.finding.fix,
        }
        for answer in answers
    ]
    return json.dumps({"examined": about(inputs), "findings": findings}, indent=2, ensure_ascii=False)


def about(inputs: Inputs) -> dict[str, str]:
    """Part → what it is, in a line."""
    lines = {}
    if inputs.policy_flags:
        config = inputs.config
        lines["policy"] = f"{inputs.policy_flags.path}, chunks of {config.chunk_size} actions" + (
            ", relative" if config.relative_actions else ""
        )
    if data := inputs.metadata:
        minutes = data.total_frames / data.fps / 60
        lasts = f"{minutes:.0f} minutes" if minutes > 10 else f"{60 * minutes:.0f} s"
        lines["dataset"] = (
            f"{data.repo_id}: {data.total_episodes:,} episodes, {data.total_frames:,} frames at {data.fps} "
            f"per second ({lasts}), {data.total_tasks} task{'s' if data.total_tasks > 1 else ''}"
        )
    if inputs.robot:
        cameras = ", ".join(inputs.robot_cameras) or "no cameras"
        lines["robot"] = f"{inputs.robot.name}: {len(inputs.robot.action_features)} actions, {cameras}"
    if inputs.env:
        lines["environment"] = f"{inputs.env.type}, {inputs.env.task}, {inputs.env.fps} actions per second"
    return lines


def _verdict(answers: list[Answer]) -> str:
    counts = [
        (len(_of(answers, severity)), severity)
        for severity in (Severity.ERROR, Severity.WARNING, Severity.NOTE)
    ]
    said = ", ".join(f"{count} {severity}{'s' if count > 1 else ''}" for count, severity in counts if count)
    worst = counts[0][0] + counts[1][0]
    if not said:
        return "Nothing is wrong."
    return f"{said[0].upper()}{said[1:]}." if worst else f"Nothing is wrong. {said}."


def _left_out(inputs: Inputs) -> str:
    parts = {
        "policy": (inputs.policy_flags, "--policy.path=CHECKPOINT"),
        "dataset": (inputs.dataset_flags, "--dataset.repo_id=NAME"),
        "robot": (inputs.robot, "--robot.type=TYPE"),
        "environment": (inputs.env, "--env.type=TYPE"),
    }
    missing = [f"{part} ({flag})" for part, (given, flag) in parts.items() if given is None]
    return f"Not given, not examined: {', '.join(missing)}." if missing else ""


def _of(answers: list[Answer], *severities: Severity) -> list[Answer]:
    return [answer for answer in answers if answer.finding.severity in severities]


def _row(name: str, text: str, indent: int = 0) -> str:
    first = f"{'':{indent}}{name:<{_LABEL - indent}}"
    return fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )
