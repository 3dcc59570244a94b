-- Charges a slot with predicted work, unless its backlog has grown past what the decision saw.
--
-- KEYS[1]  directory of the pool
-- ARGV     decision id, slot, prefill tokens, backlog seen in tokens or -1, time to live in ms, samples of what
--          is to be computed (PENDING_SAMPLE of keys.py), how long they are pending in ms
-- Returns  1 if charged; otherwise {what `pending` returns; what `fleet` returns}

local decision_id, slot, tokens, seen_tokens, ttl_ms, samples, pending_ms = unpack(ARGV)
local SAMPLE_BYTES = 12
slot, tokens, seen_tokens = tonumber(slot), tonumber(tokens), tonumber(seen_tokens)
local now = now_ms()
purge(now)
settle(decision_id)
redis.call('HDEL', PENDING, decision_id)

local row = read_row(slot)
if expiry_of(row) <= now then
  return {pending(), fleet(now)}
end
local _, _, epoch, charged_tokens = unpack_from(LIVE_HEAD, row)
local waiting_prefill_tokens = unpack_from('<I4', row, LOAD_AT + 8)
if seen_tokens >= 0 and waiting_prefill_tokens + charged_tokens > seen_tokens then
  return {pending(), fleet(now)}
end

charge(slot, row, tokens, 1)
redis.call('HSET', RESERVATIONS, decision_id, pack('<I2I4I4', slot, epoch, tokens))
redis.call('ZADD', EXPIRY, now + ttl_ms, decision_id)
redis.call('ZADD', TAKEN .. slot, now, decision_id)

if samples ~= '' then
  local num_pending = redis.call('HLEN', PENDING)
  if num_pending >= MOST_PENDING then
    local flat = redis.call('HGETALL', PENDING)
    for at = 1, #flat, 2 do
      local _, _, expires = unpack_from('<I2I4d', flat[at + 1])
      if expires <= now then
        redis.call('HDEL', PENDING, flat[at])
        num_pending = num_pending - 1
      end
    end
  end
  if num_pending < MOST_PENDING then
    local head = pack('<I2I4dB', slot, epoch, now + pending_ms, #samples / SAMPLE_BYTES)
    redis.call('HSET', PENDING, decision_id, head .. samples)
  end
end
return 1
