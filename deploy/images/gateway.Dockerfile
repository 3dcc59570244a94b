# kvlane's gateway. From the repository's root: docker build -f deploy/images/gateway.Dockerfile -t kvlane-gateway .
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir '/src[gateway]' && rm -rf /src
RUN useradd --uid 10001 --create-home kvlane
USER 10001
# Tokenizers come here: mount a volume over it.
ENV HF_HOME=/home/kvlane/cache
RUN mkdir /home/kvlane/cache
ENTRYPOINT ["kvlane"]
CMD ["gateway"]
