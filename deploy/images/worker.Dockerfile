# A vLLM that publishes what it holds. From the repository's root:
#   docker build -f deploy/images/worker.Dockerfile -t kvlane-worker .
ARG VLLM=v0.32.0
FROM vllm/vllm-openai:${VLLM}
COPY . /src
# The base install changes no version that vLLM pins.
RUN pip install --no-cache-dir /src && rm -rf /src
ENTRYPOINT ["kvlane"]
CMD ["serve", "--help"]
