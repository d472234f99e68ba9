"""Packaging of the example router."""

from setuptools import setup

setup(
    name="strictproxy-sticky-router",
    version="0.1.0",
    description="Example: requests of one tenant go to the same few pods",
    packages=["strictproxy_sticky", "strictproxy.plugins"],
    install_requires=["strictproxy"],
    python_requires=">=3.11",
)
