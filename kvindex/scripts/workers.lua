-- Describes every worker that is not fenced. Writes nothing.
--
-- KEYS[1]  directory of the pool
-- ARGV     none
-- Returns  {{slot, worker as JSON, count, digest}...; what `fleet` returns}

local described = {}
for index, slot in ipairs(to_slots(read_set('members'))) do
  local state = redis.call('HMGET', SLOT .. slot, 'worker', 'count', 'digest')
  described[index] = {slot, state[1], tonumber(state[2]), state[3]}
end
return {described, fleet(now_ms())}
