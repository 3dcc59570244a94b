-- Counts the gateways that are there, and the caller among them.
--
-- KEYS[1]  gateways by the time (ms) until which they count
-- ARGV     the caller's name, how long it counts from now in ms; 0 or less leaves
-- Returns  how many there are

local name, ttl_ms = unpack(ARGV)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], now + ttl_ms, name)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do
  redis.call('ZREM', KEYS[1], gone)
end
return #redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '+inf')
