# The dependencies, from the one place where they are declared: the head of dosvob.py. A stage of its own, so that the next
# one installs them anew only when they change, and not with every other edit of dosvob.py.
FROM python:3.13-slim AS dependencies
COPY dosvob.py /
RUN sed -n '/^# \/\/\/ script$/,/^# \/\/\/$/ s/^# //p' /dosvob.py | grep -v '^///' \
    | python -c 'import sys, tomllib; print(*tomllib.load(sys.stdin.buffer)["dependencies"], sep="\n")' \
    > /requirements.txt \
    && test -s /requirements.txt

FROM python:3.13-slim
COPY --from=dependencies /requirements.txt /
RUN pip install --no-cache-dir --root-user-action=ignore --disable-pip-version-check -r /requirements.txt
ENV PYTHONDONTWRITEBYTECODE=1 HOME=/tmp DOSVOB_COMMAND="docker-compose exec dosvob python dosvob.py"
WORKDIR /dosvob
# It begins as root, in `exec` too, to become whoever owns backups/: see cron.py, which `python dosvob.py` is here as well.
ENTRYPOINT ["python", "cron.py"]
HEALTHCHECK --interval=2m --timeout=60s --retries=2 CMD ["python", "cron.py", "health"]
RUN ln -s cron.py dosvob.py
COPY .docker/cron.py ./
COPY dosvob.py lib/
