# One node of Isthmus. State is in /data; give it a volume.
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY isthmus isthmus
COPY proxy proxy
COPY replication replication
COPY routing routing
RUN python -m venv /opt/isthmus && HATCH_BUILD_HOOK_ENABLE_CUSTOM=1 /opt/isthmus/bin/pip install --no-cache-dir .

FROM python:3.12-slim-bookworm
# It runs as root because a volume on Fly belongs to root; elsewhere add `--user` and a volume of that user.
COPY --from=build /opt/isthmus /opt/isthmus
ENV PATH=/opt/isthmus/bin:$PATH ISTHMUS_DATA=/data
VOLUME /data
EXPOSE 8080
CMD ["isthmus", "run"]
