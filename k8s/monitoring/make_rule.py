"""Writes prometheusrule.yaml: the rules of alerts.yaml as an object of Prometheus' operator."""

from pathlib import Path

HERE = Path(__file__).parent
HEAD = """\
# Made of alerts.yaml by make_rule.py.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: strictproxy
spec:
"""


def main() -> None:
    """Write the file."""
    lines = (HERE / "alerts.yaml").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    text = HEAD + "".join(f"  {line}\n" for line in rules)
    (HERE / "prometheusrule.yaml").write_text(text)


if __name__ == "__main__":
    main()
