# BotFarm alone: neither the embedded database (set DATABASE_URL or DATABASE_URL_FILE) nor what the tests need.
FROM python:3.13-slim-trixie AS build
COPY requirements.txt .
# What goes again is never used: examples for OpenAPI documents, an editor of them, and the maps of minified scripts.
RUN sed -i '/^## The embedded database/,$d' requirements.txt \
    && python -m venv --without-pip /venv \
    && python -m pip --python /venv/bin/python install -q --no-cache-dir --only-binary :all: -r requirements.txt \
    && python -m pip --python /venv/bin/python uninstall -q -y faker polyfactory \
    && find /venv \( -name '*.map' -o -name 'swagger-editor*' -o -name 'swagger-ui-es-*' \) -delete

FROM python:3.13-slim-trixie
# Volumes of docker-compose.yml take their owner from these folders.
RUN install -d -m 700 -o 65532 -g 65532 /secrets/service /secrets/database
COPY --from=build /venv /venv
WORKDIR /botfarm
COPY LICENSE botfarm.py ./
COPY farm farm
COPY migrations migrations
COPY sql sql
# What several workers share lies in memory, which is there on a read-only root too.
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TMPDIR=/dev/shm BOTFARM_HOST=0.0.0.0
# By number, so that Kubernetes sees that it is not root.
USER 65532:65532
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s CMD ["python", "-m", "farm.check"]
ENTRYPOINT ["python", "botfarm.py"]
CMD ["serve"]
