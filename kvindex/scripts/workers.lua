-- Describes a slice of the workers that are not fenced. Writes nothing.
--
-- KEYS[1]  directory of the pool
-- ARGV     workers to skip, most to describe
-- Returns  {number of workers; {slot, worker as JSON, count, digest, given role or '', step costs as
--          JSON or '', 1 if draining}...; what `fleet` returns}

local slots = to_slots(read_set('members'))
local first = tonumber(ARGV[1])
local described = {}
for index = first + 1, math.min(first + ARGV[2], #slots) do
  local slot = slots[index]
  local state = redis.call('HMGET', SLOT .. slot, 'worker', 'count', 'digest', 'worker_id', 'costs')
  if state[1] then -- Redis may have lost it
    local role = redis.call('HGET', ROLES, state[4]) or ''
    local draining = redis.call('HGET', DRAINING, state[4]) and 1 or 0
    described[#described + 1] = {slot, state[1], tonumber(state[2]), state[3], role, state[5] or '', draining}
  end
end
return {#slots, described, fleet(now_ms())}
