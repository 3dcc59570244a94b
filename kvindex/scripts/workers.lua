-- Describes every worker that is not fenced. Writes nothing.
--
-- KEYS[1]  directory of the pool
-- ARGV     none
-- Returns  {{slot, worker as JSON, count, digest}...; what `fleet` returns}

local described = {}
for _, slot in ipairs(to_slots(read_set('members'))) do
  local state = redis.call('HMGET', SLOT .. slot, 'worker', 'count', 'digest')
  if state[1] then -- Redis may have lost it
    described[#described + 1] = {slot, state[1], tonumber(state[2]), state[3]}
  end
end
return {described, fleet(now_ms())}
