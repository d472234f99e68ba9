# syntax=docker/dockerfile:1
# docker build -t strictproxy .

FROM python:3.13-slim AS build
WORKDIR /src
COPY setup.py pyproject.toml README.md LICENSE ./
COPY strictproxy strictproxy
COPY twisted twisted
# The plugin cache is written now, because nothing can write it at run time.
RUN python -m venv /opt/strictproxy \
    && /opt/strictproxy/bin/pip install --no-cache-dir . \
    && /opt/strictproxy/bin/twistd --help > /dev/null \
    && test -s "$(/opt/strictproxy/bin/python -c 'import twisted.plugins as p; print(p.__path__[-1])')/dropin.cache"

FROM python:3.13-slim
COPY --from=build /opt/strictproxy /opt/strictproxy
ENV PATH=/opt/strictproxy/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /
EXPOSE 8080 9901
# No pid file: the root file system may be read-only.
ENTRYPOINT ["twistd", "--nodaemon", "--pidfile=", "strictproxy"]
CMD ["--config", "/etc/strictproxy/strictproxy.yaml"]
