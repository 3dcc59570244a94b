-- Gives a worker a role, or takes back the one it was given. It keeps the role through restarts.
--
-- KEYS[1]  directory of the pool
-- ARGV     worker id, role or '' for the one it starts with
-- Returns  1, or 0 if no such worker is registered

local worker_id, role = unpack(ARGV)
if not redis.call('HGET', IDS, worker_id) then
  return 0
end
if role == '' then
  redis.call('HDEL', ROLES, worker_id)
else
  redis.call('HSET', ROLES, worker_id, role)
end
redis.call('HINCRBY', DIRECTORY, 'version', 1)
return 1
