-- Has a worker sent no more requests, or again. It stays so through restarts.
--
-- KEYS[1]  directory of the pool
-- ARGV     worker id, 1 to send no more or 0 to send again
-- Returns  1, or 0 if no such worker is registered

local worker_id, is_draining = unpack(ARGV)
if not redis.call('HGET', IDS, worker_id) then
  return 0
end
if is_draining == '1' then
  redis.call('HSET', DRAINING, worker_id, 1)
else
  redis.call('HDEL', DRAINING, worker_id)
end
redis.call('HINCRBY', DIRECTORY, 'version', 1)
return 1
