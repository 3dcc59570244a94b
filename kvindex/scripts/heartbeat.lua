-- Renews a lease, replaces the load and settles the reservations that the load now contains.
--
-- KEYS[1]  directory of the pool
-- ARGV     slot, incarnation, lease in ms, packed load (LOAD of keys.py), age in ms from which the slot's
--          reservations are settled or -1, then decision ids to settle
-- Returns  {count, digest} of the slot; false if it is not this incarnation's

local slot, incarnation, lease_ms, load, settle_older_than_ms = unpack(ARGV, 1, 5)
slot, settle_older_than_ms = tonumber(slot), tonumber(settle_older_than_ms)
local state = own(slot, incarnation)
if not state or read_row(slot) == NO_ROW then
  return false
end

write_though_full()
local now = now_ms()
for index = 6, #ARGV do
  settle(ARGV[index])
end
if settle_older_than_ms >= 0 then
  local latest = now - settle_older_than_ms
  for _, decision_id in ipairs(redis.call('ZRANGEBYSCORE', TAKEN .. slot, '-inf', latest)) do
    settle(decision_id)
  end
end
purge(now)

local _, _, epoch, tokens, requests = unpack_from(LIVE_HEAD, read_row(slot))
write_row(slot, pack(LIVE_HEAD, now + lease_ms, lease_ms, epoch, tokens, requests) .. load)
return {tonumber(state[3]), state[4]}
