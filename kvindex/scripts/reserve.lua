-- Charges a slot with predicted work, unless its backlog has grown past what the decision saw.
--
-- KEYS[1]  directory of the pool
-- ARGV     decision id, slot, prefill tokens, backlog seen in tokens or -1, time to live in ms
-- Returns  1 if charged; otherwise what `fleet` returns

local decision_id, slot, tokens, seen_tokens, ttl_ms = unpack(ARGV)
slot, tokens, seen_tokens = tonumber(slot), tonumber(tokens), tonumber(seen_tokens)
local now = now_ms()
purge(now)
settle(decision_id)

local row = read_row(slot)
if expiry_of(row) <= now then
  return {fleet(now)}
end
local _, _, epoch, charged_tokens = unpack_from(LIVE_HEAD, row)
local waiting_prefill_tokens = unpack_from('<I4', row, LOAD_AT + 8)
if seen_tokens >= 0 and waiting_prefill_tokens + charged_tokens > seen_tokens then
  return {fleet(now)}
end

charge(slot, row, tokens, 1)
redis.call('HSET', RESERVATIONS, decision_id, pack('<I2I4I4', slot, epoch, tokens))
redis.call('ZADD', EXPIRY, now + ttl_ms, decision_id)
redis.call('ZADD', TAKEN .. slot, now, decision_id)
return 1
